"""fastee inside other frameworks, one file each, and fastee.attach, which knows them by name; a file is imported on use and says what to install where its framework is missing."""
