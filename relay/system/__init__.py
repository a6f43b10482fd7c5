"""Composition and supervision: settings become a running relay, which is watched, asked and stopped."""
