"""The status page: its contents, how they are read and drawn, and its templates."""
