"""Person re-identification."""
