"""Packed models for runtimes without Python."""
