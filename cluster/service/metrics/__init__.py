"""What Prometheus reads from a front: calls as they come, and the cluster as it is at the moment of the scrape."""
