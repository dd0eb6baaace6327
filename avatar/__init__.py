"""Head avatars from a monocular video, on avatar_ops."""
