"""The bugs that plant_bugs.py plants, by part of the package."""
