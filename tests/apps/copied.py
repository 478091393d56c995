"""The table into which the bodies of ``step_app`` copy numbers. If no commit is lost or doubled, it
contains each number once.
"""

from __future__ import annotations

import sqlalchemy as sa

copied = sa.Table("copied", sa.MetaData(), sa.Column("n", sa.Integer))
