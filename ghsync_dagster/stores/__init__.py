"""The edges: Spark and MongoDB. The only package that imports pyspark and pymongo at module level."""
