"""Geometry, materials and motion of the embedded subject, rendered by tools/bake_subject.py."""
