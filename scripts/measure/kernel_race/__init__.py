"""What the scripts that measure compute; the scripts print it and judge it."""
