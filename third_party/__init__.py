"""What is specific to the upstream packages: pins, licences and the touch points in them."""
