from avatar.data.point_avatar import Frames, load_frames

__all__ = ["Frames", "load_frames"]
