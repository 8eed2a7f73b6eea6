"""What a text is about, and the configuration that comes with the package. Pure; reads only the
files of gateway/data, when it is first asked."""
