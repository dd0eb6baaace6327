from avatar.head.model import HeadModel, embedded_head, load_head, rotation_matrices

__all__ = ["HeadModel", "embedded_head", "load_head", "rotation_matrices"]
