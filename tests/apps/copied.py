"""What the bodies of ``step_app`` write: each number once, if nothing goes wrong."""

from __future__ import annotations

import sqlalchemy as sa

copied = sa.Table("copied", sa.MetaData(), sa.Column("n", sa.Integer))
