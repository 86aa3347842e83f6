"""What people look at: pages, pictures, charts."""
