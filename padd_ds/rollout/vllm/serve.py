"""vLLM's own HTTP server, by its own command line; run by path inside vLLM's interpreter."""

from vllm.entrypoints.launchers.api_server.entry import main

if __name__ == "__main__":
    main()
