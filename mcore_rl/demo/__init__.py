"""`mcore-rl demo`; a wheel has the demo's configurations and problems in this directory."""
