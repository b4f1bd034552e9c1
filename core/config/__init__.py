"""Settings: one YAML file, the same names on the command line."""

from drivetrain.config.loading import load_settings, parse_assignment
from drivetrain.config.settings import EngineSettings, Settings

__all__ = ["EngineSettings", "Settings", "load_settings", "parse_assignment"]
