"""A run: its folder, its stages, its log, and how it is watched and interrupted."""
