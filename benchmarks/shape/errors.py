"""What can be wrong with what somebody asks for."""


class ShapeError(Exception):
    """The records, or a directory, do not fit the plan."""
