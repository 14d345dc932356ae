"""Networks: the backbone, its projection heads, and how both are saved and loaded."""
