"""What every program on the JVM needs: a Java, the locked jars, the archive of its classes. Not here: what is run."""
