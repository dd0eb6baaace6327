class AvatarError(Exception):
    """Something the user can put right; the commands print its message as one line."""


class Stopped(Exception):
    """Training was asked to stop; everything needed to go on is saved."""
