"""The studio in the browser: build_app(engine) in app/studio.py, one file for each tab."""
