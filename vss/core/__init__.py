"""What every room uses and nothing of vss is used by: errors, files, registry, recipe, report, environment.

The version stands here as a literal, so that the build reads it without importing anything.
"""

__version__ = "0.1.0"
