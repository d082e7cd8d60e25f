"""What all tests share: hypothesis draws the same examples each time, and a loaded machine is no failure."""

from hypothesis import settings

settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")
