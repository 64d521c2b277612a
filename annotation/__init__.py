"""What people draw on images in other programs, as class ids, and class ids as what they open."""
