"""Launchers for several processes, clusters and clouds."""
