"""Hooks that make grkan known to other libraries. Each is applied when its library is imported; none imports it."""
