"""What all tests share."""


def pytest_collection_modifyitems(config, items):
    """Tests that take half an hour run when -m names them, and never else: not by default, nor with -m "not slow"."""
    if "full_size" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("full_size")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
