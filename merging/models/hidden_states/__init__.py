"""Hidden states that lower blocks of a model gave, kept so that these need not run again."""
