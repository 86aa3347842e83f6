"""Differentiable rendering and unwrapping of textured meshes."""
