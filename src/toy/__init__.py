"""The paper's toy experiment (v3, appendix F): tiny networks learn to rank, with and without a bias of the prompts."""
