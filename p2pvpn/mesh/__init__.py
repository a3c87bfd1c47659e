"""The engine: how peers find, call, connect to and keep each other."""
