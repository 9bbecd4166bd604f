"""Profiles: what is trained, how it is judged, and where it runs."""
