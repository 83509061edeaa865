"""fastee inside other frameworks, one file each; a file is imported on use and says what to install where its framework is missing."""
