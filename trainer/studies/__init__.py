"""Measurements that fill docs/measurements/, each a script."""
