"""Whether the plugin is live and right on this machine."""
