"""Ray: where actors run. The only folder that imports it."""
