from fastee.cli import main

main()
