"""What every rank runs; started only by `accelerate launch --module`, never imports prefect."""
