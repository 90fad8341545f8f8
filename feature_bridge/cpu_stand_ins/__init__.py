"""Stand-ins for what CPU machines lack; each is used only where the real thing is absent, and says so."""
