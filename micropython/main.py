"""Runs after boot.py; what stands here instead of `app` is the firmware engineer's own program."""

import app

app.main()
