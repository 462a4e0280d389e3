from arabic_qwen.cli import main

main()
