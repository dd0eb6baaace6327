class AvatarError(Exception):
    """Something the user can put right; the commands print its message as one line."""


class Stopped(Exception):
    """Work was asked to stop; in training, everything needed to go on is saved."""
