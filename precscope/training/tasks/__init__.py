"""Tasks that come with precscope: real data that every machine has, small by default."""
