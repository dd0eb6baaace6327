from avatar.data.point_avatar import Frames, Tracking, load_frames, load_tracking

__all__ = ["Frames", "Tracking", "load_frames", "load_tracking"]
