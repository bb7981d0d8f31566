"""What a run starts from: images, networks and their first weights."""
