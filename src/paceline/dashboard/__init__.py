"""What do people see of a running gateway? Pages made in a process of their own.

It asks the admin API, and only while somebody looks. What it shows is written here as HTML and SVG;
the browser needs nothing from elsewhere.
"""
