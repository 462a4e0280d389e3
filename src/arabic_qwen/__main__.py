from arabic_qwen.commands.cli import main

main()
