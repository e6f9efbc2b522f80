"""What people look at: the HTML page as Jinja2 templates, and what the figures share."""
