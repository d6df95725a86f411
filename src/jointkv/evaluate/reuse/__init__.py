"""What predicts a block that is not computed: errors of pages behind other headers, and rules that decide by them."""
